"""The shared library of the book: images, models, taps, measurements, records, claims, plots."""
