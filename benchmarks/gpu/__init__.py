"""Check on a GPU that the library is right there, and how fast it is beside PEFT and the base."""
