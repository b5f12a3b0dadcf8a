"""Why a machine failed: its examination, the explanation in errors, and saved artifacts."""
