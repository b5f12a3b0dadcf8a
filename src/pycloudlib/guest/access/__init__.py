"""How a guest is reached: SSH, its keys, commands and files over it."""
