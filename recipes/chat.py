from trl_reasoning_distill.scripts.chat import main

if __name__ == "__main__":
    main()
