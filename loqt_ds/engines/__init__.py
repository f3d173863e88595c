"""How a step is taken and where the trained state lives: one device, or DeepSpeed."""
