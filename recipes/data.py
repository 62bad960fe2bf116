from trl_reasoning_distill.scripts.data import main

if __name__ == "__main__":
    main()
