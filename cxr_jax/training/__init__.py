"""What SFT and RL do alike."""
