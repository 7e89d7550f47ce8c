__version__ = "0.1.0"
PROTOCOL = 1
