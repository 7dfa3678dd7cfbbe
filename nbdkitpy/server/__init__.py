"""All that touches the operating system: listeners, connections, signals, processes."""
