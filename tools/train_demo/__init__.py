"""How the demo model that ships with the engine was made: corpus, tasks, training, conversion.

README.md has the commands. Training needs torch; everything else runs without.
"""
