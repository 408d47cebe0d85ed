"""Hit rates of prefix caches from requests alone: no model runs and no tokens are looked at."""
