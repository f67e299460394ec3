"""Small tools without domain knowledge: atomic files, memory limits, progress, process pools."""
