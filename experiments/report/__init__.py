"""`report`: a page of tables and pictures from result folders."""
