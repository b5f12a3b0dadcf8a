"""One machine and its QEMU: started, talked to, watched, changed and ended."""
