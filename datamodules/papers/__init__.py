"""Papers from libraries and dumps, and the collections made from them.

One module per format turns a record into a Paper; formats.py finds and recognises files; library.py stores the papers
of all files; views.py makes the collection of each kind of task.
"""
