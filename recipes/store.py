from trl_reasoning_distill.scripts.store import main

if __name__ == "__main__":
    main()
