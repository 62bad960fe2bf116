# Not select.py: a launch script's folder comes first on Python's path, and `select` is a module of the standard library.
from trl_reasoning_distill.scripts.select import main

if __name__ == "__main__":
    main()
