"""Section 4.2: the ImageNet experiments."""
