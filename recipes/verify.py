from trl_reasoning_distill.scripts.verify import main

if __name__ == "__main__":
    main()
