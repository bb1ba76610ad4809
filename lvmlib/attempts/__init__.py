"""The original's attempts after v2.3 (handbook §5): importing this registers P7 and P8, models and loss terms."""
