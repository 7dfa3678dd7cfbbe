"""What is in guest/ is for the inside of the virtual machine, where run.py takes it."""

collect_ignore = ["guest"]
