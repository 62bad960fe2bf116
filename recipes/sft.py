from trl_reasoning_distill.scripts.sft import main

if __name__ == "__main__":
    main()
