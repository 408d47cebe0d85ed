"""What lies on the device, the jitted calls that update it, and the programs they compile to."""
