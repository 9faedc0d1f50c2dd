"""Other libraries' ways to call attention. Each module imports its library; nothing here is imported by the package."""
