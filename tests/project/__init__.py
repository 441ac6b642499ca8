"""Of the project as a whole: imports, examples, pages, random cases, other devices."""
