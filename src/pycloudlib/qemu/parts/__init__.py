"""What a machine is made of: values that say what each part adds; launch, save and copy do it."""
