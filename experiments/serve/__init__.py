"""The parts of `serve`: what is asked, the replay, its measures, and how they are shown."""
