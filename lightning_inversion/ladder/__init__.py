"""Small models of several widths, trained here to ask what training does to inversion."""
