"""Pure codecs and contracts of the protocols that clients and model servers speak."""
