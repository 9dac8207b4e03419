"""HRNet: an identity photo -> the person in it, on white."""
