"""What belongs to a processor architecture, free of any accelerator."""
