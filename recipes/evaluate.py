from trl_reasoning_distill.scripts.evaluate import main

if __name__ == "__main__":
    main()
