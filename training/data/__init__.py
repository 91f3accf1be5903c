"""From files to slices: finding and reading scans, preprocessing, the slice cache, and splits."""
