"""Read papers from libraries and dumps, and make collections from them.

One module per format turns a record into a Paper; formats.py finds files and recognises their format; library.py stores
the papers of all files; views.py makes a collection for each kind of task.
"""
