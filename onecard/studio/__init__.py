"""The studio: a page on which data are looked at, runs are started, watched, asked, compared and exported."""
