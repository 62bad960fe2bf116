from trl_reasoning_distill.scripts.capture import main

if __name__ == "__main__":
    main()
