"""Engines behind the interfaces of other libraries, which need not be installed to import these."""
