"""The public operations: each documents, checks its arguments and binds its primitive."""
