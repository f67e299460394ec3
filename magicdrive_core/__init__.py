"""MagicDrive-V2: data, network, training, generation and benchmark."""
