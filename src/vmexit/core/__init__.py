"""What every layer above shares: guest memory, the bus, exit tracing, errors."""
