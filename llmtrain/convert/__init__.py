"""Weight names and layouts of other projects, as invertible maps used both ways."""
