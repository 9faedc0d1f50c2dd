"""Other libraries' ways to call attention. A module imports its library, or only takes its keywords; nothing here is
imported by the package.
"""
