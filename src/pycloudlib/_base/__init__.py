"""Small private tools that everything else uses; they know nothing of machines."""
