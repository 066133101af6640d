"""The only wiring: settings become adapters, rooms, loops and processes here and nowhere else."""
