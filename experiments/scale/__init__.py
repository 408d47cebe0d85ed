"""Engines as actors of Ray behind a front end: what that takes, and what becomes of a lost one."""
