from trl_reasoning_distill.scripts.distill import main

if __name__ == "__main__":
    main()
