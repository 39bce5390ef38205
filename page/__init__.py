"""The page in the browser, the thread that plays for it, and the session folder."""
