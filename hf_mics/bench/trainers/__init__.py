"""How does each system train? One file per library, all behind `Trainer`."""
