from trl_reasoning_distill.scripts.gkd import main

if __name__ == "__main__":
    main()
