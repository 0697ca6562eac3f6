"""Linux KVM, one class per file descriptor: System → Vm → Vcpu."""
