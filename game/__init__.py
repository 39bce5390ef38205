"""The world that is walked in: scenes, pictures, figures and ways, in numpy alone."""
