import sys,random,collections
sys.path.insert(0,'.')
from tests.verification.test_properties import wrongly_judged, KINDS, hacks
from trl_reasoning_distill.verification.verify import verify_answers
n=int(sys.argv[1])
for k in KINDS:
    for e in (True,False):
        w=wrongly_judged(k,n,seed=7,equal=e)
        if w: print(k,e,len(w)); [print('   ',x[0],'|',x[1],'|',x[2].status,x[2].reason[:140]) for x in w[:4]]
