"""The same small task, played by an agent of every framework; each file is one agent."""
