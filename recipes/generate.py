from trl_reasoning_distill.scripts.generate import main

if __name__ == "__main__":
    main()
